"""How asks reach the workers that play clients, and answers come back: one file a transport (`fedlora.messages.Transport`)."""
