"""``pearl serve --replicas``: the server's app in several processes, on one machine or more, under Ray Serve."""
