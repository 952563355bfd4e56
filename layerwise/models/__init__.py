"""Load models, find their structure, and stream their blocks."""
