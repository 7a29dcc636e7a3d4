"""Every face of a checkpoint name, in every state: what is right and what refuses. The docs table is made from here."""
