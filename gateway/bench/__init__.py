"""`duet bench`: load on a real gateway, measured so that anybody can repeat it.

A shape is a module with `run(stage, options)` (`fanout`, `agree`); `cli` is the registry. What is
loaded is a `target.Target`, so that a peer can take the gateway's place in the same run.
"""
