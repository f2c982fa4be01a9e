"""Forward process, objective and loss."""
