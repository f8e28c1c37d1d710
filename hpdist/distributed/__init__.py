"""Communication between ranks: collectives, rendezvous, global statistics, watchdogs."""
