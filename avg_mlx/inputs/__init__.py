"""What a user gives: an image becomes crops, a question becomes prompt ids."""
