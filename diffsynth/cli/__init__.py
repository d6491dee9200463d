"""The `fastvmt` command. It knows no maths: each command calls the public functions of the other rooms."""
