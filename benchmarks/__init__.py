"""How fast fedlora is, measured against its peers: see README.md beside this."""
