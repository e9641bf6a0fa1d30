"""What apoq must survive: real servers, processes and signals, one fault at a time."""
