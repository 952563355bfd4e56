"""The promises of the layer contract, checked on any method file; and a method file to begin with."""
