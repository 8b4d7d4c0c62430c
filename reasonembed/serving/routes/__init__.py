"""Routes by whose protocol they speak; each module gives a router over the service's parts."""
