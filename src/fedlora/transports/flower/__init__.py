"""Clients on other machines, reached by Flower: the one package that imports flwr.

link.py       the server's side: a transport over Flower's Grid
apps.py       what Flower starts: the ServerApp, and the ClientApp, which passes bytes to the client's own worker
payload.py    how bytes travel in Flower's messages
"""
