"""`nsa-plugin doctor`: what is installed, what the settings ask for, what each path would get, and why not more."""
