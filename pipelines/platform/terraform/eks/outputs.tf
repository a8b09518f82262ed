output "site" {
  description = "kustomize/overlays/eks/site.yaml, to be committed there."
  value = templatefile("${path.module}/site.yaml.tftpl", {
    prefix   = "${data.aws_caller_identity.here.account_id}-${var.name}"
    database = var.network_cidr
  })
}

output "registry" {
  description = "Where images are pushed to: newName in kustomize/overlays/eks/images."
  value       = aws_ecr_repository.python.repository_url
}

output "database" {
  description = "What the secret mlflow-database holds, but for PGPASSWORD."
  value = {
    PGHOST     = aws_db_instance.main.address
    PGPORT     = "5432"
    PGDATABASE = aws_db_instance.main.db_name
    PGUSER     = aws_db_instance.main.username
    PGSSLMODE  = "require"
  }
}

output "warehouse_url" {
  description = "What the sinks of the sites are told (PREDMAINT_WAREHOUSE_URL), once the runbook has made user and database. Steps don't read it."
  value       = "postgresql://warehouse:PASSWORD@${aws_db_instance.main.address}:5432/warehouse?sslmode=require"
}

output "gpu_settings" {
  description = "Settings (kustomize/overlays/eks/site.yaml) that send training to the GPU nodes."
  value = {
    PREDMAINT_PIPELINE_GPU       = "nvidia.com/gpu=1"
    PREDMAINT_PIPELINE_NODE_POOL = "${local.gpu_pool.key}=${local.gpu_pool.value}"
  }
}

output "credentials" {
  description = "The command that lets kubectl in."
  value       = "aws eks update-kubeconfig --name ${aws_eks_cluster.main.name} --region ${var.region}"
}
