"""The local trainer: clients' training requests over one resident frozen base."""
