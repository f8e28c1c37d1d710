"""What ranks say to one another: collectives, rendezvous, global statistics, watchdogs."""
