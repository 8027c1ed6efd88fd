"""Memory, traffic and time of a run, planned from its model's config alone, without weights or processes.

step            one micro-batch on the meta device: saved activations, peak memory, the order of modules
memory_meter    counts the storages that torch code allocates
zero_trace      when ZeRO-3 gathers parameters, and how many at a time
memory          bytes of one rank: static memory and peaks
costs           arithmetic and traffic of tensor parallelism
timing          seconds of a step, from the speed of devices and links
plan            all of these as one `Plan`, and the recommendation of settings
report          a plan as text and JSON
"""
