"""What developers of this project run and users do not."""
