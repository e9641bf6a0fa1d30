"""Background tasks."""

from django.db import migrations

from apoq.migrations import downgrade_sql, upgrade_sql


class Migration(migrations.Migration):
    dependencies = [("signup", "0001_initial")]

    operations = [migrations.RunSQL(upgrade_sql(version=1), downgrade_sql(version=0))]
