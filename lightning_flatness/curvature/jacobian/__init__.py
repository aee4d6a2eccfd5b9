"""Any layer and the whole network, by as many backward passes as there are classes, less one."""
