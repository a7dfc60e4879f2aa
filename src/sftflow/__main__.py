from sftflow.cli import main

main()
