"""Tables beside accepted, published or other tables."""
