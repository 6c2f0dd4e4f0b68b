"""Serve the shop: `python -m examples.shop`, configured by the variables in `settings.py`."""

import logging

import uvicorn

from examples.shop.app import create_app
from examples.shop.settings import Settings

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    uvicorn.run(create_app(Settings.from_env()), log_config=None)
