"""Data sets: from a file, a folder, a package or the Hub to texts and labels, and from there to clients."""
