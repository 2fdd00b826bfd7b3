"""Hospital side: reads cases, trains and evaluates; nothing leaves except through `clients.guard.egress`."""
