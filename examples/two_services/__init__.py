"""Two services that tell each other what happened, over a broker, and lose nothing on the way.

`orders` takes orders, `billing` writes their invoices. Each is an app, a process and a database of
its own. `shop_events.py` is all that they share; `brokers.py` has what differs between brokers.

    pip install ".[faststream,outbox]" fastapi uvicorn aiosqlite "faststream[nats]"
    nats-server -js
    uvicorn examples.two_services.orders:app --port 8001
    uvicorn examples.two_services.billing:app --port 8002
    curl localhost:8001/orders/7 --json '{"customer": "ada", "total_cents": 990}'
    curl localhost:8002/invoices

`nox -s demo -- two-services` shows it at work: killed in the middle, and with a message that comes
twice.
"""
