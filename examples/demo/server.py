"""Owns the shop's process in the demo: serves it, and tells what it does."""

from __future__ import annotations

import sys

from examples.demo.witness import serve
from examples.shop.app import create_app
from examples.shop.resources import Resources
from examples.shop.settings import Settings

if __name__ == "__main__":
    app = create_app(Settings.from_env())
    resources: Resources = app.state.resources
    serve(app, resources.bus, int(sys.argv[1]))
