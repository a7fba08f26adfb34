"""Block swap: some blocks keep their weights in the mapped file and stream through the device, one way only.

    file --reader thread--> staging ring (pinned) --copy stream--> device slots --> the block's modules

While a block computes, the next ones are read and copied; behind the last comes the first again, for the other half
of the guidance or the next step. Nothing is written back, and once the ring stands nothing is allocated but a small
buffer where a dtype changes.
"""
