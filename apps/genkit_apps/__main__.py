from genkit_apps.cli import main

main()
