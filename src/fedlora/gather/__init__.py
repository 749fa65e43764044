"""How the replies of a round come together before a method aggregates them."""
