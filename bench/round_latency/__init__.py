"""How long forwards and rounds of real model shapes take, under scripted verdicts."""
