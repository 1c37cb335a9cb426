"""What the router saw: its vote taken apart into regions and words, as numbers and as a picture."""
