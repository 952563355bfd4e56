"""What a method is given and what it returns."""
