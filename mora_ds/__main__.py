"""`python -m mora_ds COMMAND` is `mora-ds COMMAND`;
`deepspeed --module mora_ds pretrain` starts its ranks this way."""

from mora_ds.commands.dispatch import main

if __name__ == "__main__":
    main()
