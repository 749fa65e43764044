"""A whole run: prepared, played, recorded, exported."""
