"""A federation between machines: what an operator sets up, what runs on the server and on each client's node.

folder.py    the folder that all parties have: the configuration, the model's outline, scripts
outline.py   what a server knows of the model, without its weights
init.py      makes the folder
server.py    the rounds; a kind of run as any other
node.py      the worker on a client's machine
processes.py Flower's own processes, started and watched
status.py    how a federation is doing
apps.py      what Flower starts
"""
