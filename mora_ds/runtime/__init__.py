"""Processes: ranks, nodes, signals, heartbeats, restarts, the command line. Imports nothing here."""
