"""What others do, written for the comparison with their usual best practice."""
