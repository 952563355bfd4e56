"""Check the promises of the layer contract on any method file; and a template of a method file."""
