"""The shop by a name that other programs can be given, configured by the environment.

uvicorn examples.shop.main:app
python -m eventkit outbox list examples.shop.main:outbox
"""

from examples.shop.app import create_app
from examples.shop.resources import Resources
from examples.shop.settings import Settings

app = create_app(Settings.from_env())

_resources: Resources = app.state.resources
outbox = _resources.outbox
