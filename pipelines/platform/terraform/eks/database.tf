# MLflow's database, and the warehouse (there is no BigQuery here): no public address, TLS only, backed up every night with the log kept in between.
resource "aws_db_subnet_group" "main" {
  name       = var.name
  subnet_ids = [for s in aws_subnet.private : s.id]
}

resource "aws_security_group" "database" {
  name        = "${var.name}-database"
  description = "PostgreSQL, from the nodes of the cluster"
  vpc_id      = aws_vpc.main.id
}

resource "aws_vpc_security_group_ingress_rule" "database" {
  security_group_id            = aws_security_group.database.id
  description                  = "PostgreSQL from the cluster"
  referenced_security_group_id = aws_eks_cluster.main.vpc_config[0].cluster_security_group_id
  ip_protocol                  = "tcp"
  from_port                    = 5432
  to_port                      = 5432
}

resource "aws_db_parameter_group" "main" {
  name   = var.name
  family = "postgres18"
  parameter {
    name  = "rds.force_ssl"
    value = "1"
  }
}

resource "aws_db_instance" "main" {
  #checkov:skip=CKV_AWS_157:A standby is a setting (database_highly_available): it doubles the price, and steps wait out a restart
  #checkov:skip=CKV_AWS_161:MLflow keeps one connection pool with one password; tokens that end after 15 minutes would end its connections
  #checkov:skip=CKV_AWS_118:Performance Insights shows what is slow; the system's own metrics would cost more than the database tells
  #checkov:skip=CKV_AWS_354:Performance Insights encrypts at rest; a key of one's own is a decision for whoever must keep one
  #checkov:skip=CKV2_AWS_30:Logging statements would log every metric that a training writes, and the data in them
  identifier                      = var.name
  engine                          = "postgres"
  engine_version                  = "18"
  instance_class                  = var.database_class
  db_name                         = "mlflow"
  username                        = "mlflow"
  password_wo                     = var.database_password
  password_wo_version             = var.database_password_version
  allocated_storage               = 20
  max_allocated_storage           = 200
  storage_type                    = "gp3"
  storage_encrypted               = true
  multi_az                        = var.database_highly_available
  db_subnet_group_name            = aws_db_subnet_group.main.name
  vpc_security_group_ids          = [aws_security_group.database.id]
  parameter_group_name            = aws_db_parameter_group.main.name
  publicly_accessible             = false
  backup_retention_period         = 14
  backup_window                   = "00:00-00:45"
  maintenance_window              = "sat:03:00-sat:04:00"
  auto_minor_version_upgrade      = true
  copy_tags_to_snapshot           = true
  deletion_protection             = true
  final_snapshot_identifier       = "${var.name}-last"
  performance_insights_enabled    = true
  enabled_cloudwatch_logs_exports = ["postgresql", "upgrade"]
}
