"""Everything about processes: ranks, nodes, signals, logging, exit codes. Imports
nothing here.

cli          runs a program's main function and sets its exit code
log_setup    configures the logger `mora_ds`
ranks        `Ranks`: this process among all processes of the run, and collective calls on small objects
nodes        the check that all nodes see the same output folder
node_memory  memory that the processes of a node share, and how much of it there is
signals      requests to stop, and how a process ends
"""
