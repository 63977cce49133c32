"""What a service of a given size needs: on paper from measured costs, and by simulation with the real policy code."""
