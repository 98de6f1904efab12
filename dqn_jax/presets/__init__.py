"""Ready-made agents: what a newcomer and the command line use. One file each: options, named sets of options, agent."""
