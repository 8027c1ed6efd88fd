"""Processes: ranks, nodes, signals, logging, exit codes. This file imports nothing.

cli          runs a program's main function and sets its exit code
log_setup    configures the logger `mora_ds`
ranks        `Ranks`: rank and world size, and collective calls on small Python objects (`exchange`: how they are sent)
nodes        checks that all nodes see the same output folder
node_memory  memory shared by the ranks of a node, and the amount of free memory
signals      stop requests, and the end of a process
"""
