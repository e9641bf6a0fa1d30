"""Users, and the mails that they received."""

import django.db.models.deletion
from django.db import migrations, models


def key():
    return models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")


class Migration(migrations.Migration):
    initial = True

    dependencies = []

    operations = [
        migrations.CreateModel(
            name="User",
            fields=[
                ("id", key()),
                ("name", models.TextField()),
                ("email", models.EmailField(max_length=254)),
            ],
        ),
        migrations.CreateModel(
            name="Mail",
            fields=[
                ("id", key()),
                ("user", models.OneToOneField(on_delete=django.db.models.deletion.CASCADE, to="signup.user")),
            ],
        ),
    ]
