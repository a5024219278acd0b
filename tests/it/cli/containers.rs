//! The image, and the files for Kubernetes: read as strictly as the tools that are here can.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde_json::{Value, json};

use super::install::{ROOT, known_options};
use super::packages::{have, output};

/// The documents of YAML text.
fn documents(text: &str) -> Result<Vec<Value>> {
    yaml_serde::Deserializer::from_str(text).map(|document| Ok(Value::deserialize(document)?)).collect()
}

/// The only document of this kind.
fn of_kind<'a>(documents: &'a [Value], kind: &str) -> Result<&'a Value> {
    documents.iter().find(|document| document["kind"] == kind).with_context(|| format!("no {kind}"))
}

/// Paths of fields that `given` has and `taken` has not, or with another value.
fn lost(given: &Value, taken: &Value, path: &str, into: &mut Vec<String>) {
    match (given, taken) {
        (Value::Object(given), Value::Object(taken)) => {
            for (name, value) in given {
                lost(value, taken.get(name).unwrap_or(&Value::Null), &format!("{path}.{name}"), into);
            }
        }
        (Value::Array(given), Value::Array(taken)) if given.len() == taken.len() => {
            for (n, (given, taken)) in given.iter().zip(taken).enumerate() {
                lost(given, taken, &format!("{path}[{n}]"), into);
            }
        }
        _ if given == taken => {}
        _ => into.push(format!("{path}: {given}, not {taken}")),
    }
}

/// The manifest without what only Helm adds.
fn without_helm(mut documents: Vec<Value>) -> Vec<Value> {
    fn clean(value: &mut Value) {
        match value {
            Value::Object(fields) => {
                fields.retain(|name, _| {
                    let helm = ["helm.sh/chart", "checksum/options"].contains(&name.as_str());
                    let standard = ["version", "managed-by", "instance"].map(|end| format!("app.kubernetes.io/{end}"));
                    !helm && !standard.contains(name)
                });
                fields.values_mut().for_each(clean);
            }
            Value::Array(values) => values.iter_mut().for_each(clean),
            _ => {}
        }
    }
    documents.iter_mut().for_each(clean);
    documents.sort_by_key(|document| document["kind"].to_string());
    documents
}

/// Where a deployment has the login of its monitor from. Its probes use the paths that need none.
fn login(deployment: &Value) -> Result<&Value> {
    let container = &deployment["spec"]["template"]["spec"]["containers"][0];
    for (probe, path) in [("livenessProbe", "/livez"), ("readinessProbe", "/readyz")] {
        ensure!(container[probe]["httpGet"]["path"] == path, "{container}");
    }
    let name = "STREAM_REPLICATOR_MONITOR_AUTH";
    ensure!(known_options()?.contains(name), "`{name}` is no option");
    let variables = container["env"].as_array().context("env")?;
    let login = variables.iter().find(|variable| variable["name"] == name).context("no login")?;
    Ok(&login["valueFrom"]["secretKeyRef"])
}

/// With all fields of the API known, where the tool is here.
fn validate(file: &Path) -> Result<()> {
    if have(&["kubernetes-validate"]) {
        output(Command::new("kubernetes-validate").arg("--strict").arg(file))?;
    }
    Ok(())
}

#[test]
fn the_dockerfile_has_no_findings() -> Result<()> {
    if !have(&["hadolint"]) {
        return Ok(());
    }
    output(Command::new("hadolint").arg("--no-color").arg(Path::new(ROOT).join("contrib/container/Dockerfile")))?;
    Ok(())
}

#[test]
fn the_manifest_is_known_to_kubernetes() -> Result<()> {
    let file = Path::new(ROOT).join("contrib/kubernetes/stream-replicator.yaml");
    let given = documents(&std::fs::read_to_string(&file)?)?;
    let options = of_kind(&given, "ConfigMap")?["data"].as_object().context("no data")?;
    let known = known_options()?;
    for name in options.keys() {
        ensure!(known.contains(name), "`{name}` is no option of {known:?}");
    }
    let deployment = of_kind(&given, "Deployment")?;
    ensure!(deployment["spec"]["replicas"] == 2, "{deployment}");
    let login = login(deployment)?;
    ensure!(login["key"] == "login" && login["optional"] == true, "{login}");
    of_kind(&given, "PodDisruptionBudget")?;

    // A change without a server reads the file into the types of the API, which lose fields that they do not have.
    if have(&["kubectl"]) {
        let alone = tempfile::NamedTempFile::with_suffix(".json")?;
        std::fs::write(alone.path(), deployment.to_string())?;
        let mut command = Command::new("kubectl");
        command.args(["set", "image", "stream-replicator=changed", "--local", "-o", "json", "-f"]).arg(alone.path());
        let taken = serde_json::from_str(&output(&mut command)?)?;
        let mut expected = deployment.clone();
        expected["spec"]["template"]["spec"]["containers"][0]["image"] = "changed".into();
        let mut missing = Vec::new();
        lost(&expected, &taken, "", &mut missing);
        ensure!(missing.is_empty(), "{missing:?}");
    }
    validate(&file)
}

/// With its own values it gives the plain manifest.
#[test]
fn the_chart_renders_the_manifest() -> Result<()> {
    if !have(&["helm"]) {
        return Ok(());
    }
    let chart = Path::new(ROOT).join("contrib/helm/stream-replicator");
    output(Command::new("helm").args(["lint", "--strict"]).arg(&chart))?;
    let render = |arguments: &[&str]| {
        let mut command = Command::new("helm");
        output(command.args(["template", "stream-replicator"]).arg(&chart).args(arguments))
    };

    let rendered = render(&[])?;
    let plain = std::fs::read_to_string(Path::new(ROOT).join("contrib/kubernetes/stream-replicator.yaml"))?;
    let (rendered_documents, plain) = (without_helm(documents(&rendered)?), without_helm(documents(&plain)?));
    ensure!(rendered_documents == plain, "{rendered_documents:#?}\nis not\n{plain:#?}");

    let other = [
        "--set",
        "replicas=3,options.STREAM_REPLICATOR_NAME=EAST,credentials.control=",
        "--set",
        "nodeSelector.disk=ssd",
    ];
    let other = render(&other)?;
    let with_values = documents(&other)?;
    let options = &of_kind(&with_values, "ConfigMap")?["data"];
    ensure!(options["STREAM_REPLICATOR_NAME"] == "EAST" && options["NATS_CREDS"].is_null(), "{options}");
    ensure!(of_kind(&with_values, "Deployment")?["spec"]["replicas"] == 3, "{other}");

    let hash = bcrypt::hash("s3cret-word", 4)?;
    let given = render(&["--set-string", &format!("monitorAuth.login=ops:{hash}")])?;
    let with_login = documents(&given)?;
    let secret = of_kind(&with_login, "Secret")?;
    ensure!(secret["stringData"]["login"] == format!("ops:{hash}").as_str(), "{secret}");
    let reference = login(of_kind(&with_login, "Deployment")?)?;
    let expected = json!({"name": secret["metadata"]["name"], "key": "login", "optional": false});
    ensure!(*reference == expected, "{reference}");
    let map = of_kind(&with_login, "ConfigMap")?.to_string();
    ensure!(!map.contains(&hash), "the hash is in {map}");
    let existing = documents(&render(&["--set", "monitorAuth.secret=logins"])?)?;
    ensure!(of_kind(&existing, "Secret").is_err());
    ensure!(login(of_kind(&existing, "Deployment")?)?["name"] == "logins");
    for wrong in ["monitorAuth.login=ops:word", "monitorAuth.user=ops", "options.STREAM_REPLICATOR_MONITOR_AUTH=ops:x"]
    {
        ensure!(render(&["--set-string", wrong]).is_err(), "{wrong}");
    }
    let both = format!("monitorAuth.login=ops:{hash},monitorAuth.secret=logins");
    ensure!(render(&["--set-string", &both]).is_err());

    for text in [rendered, other, given] {
        let file = tempfile::NamedTempFile::with_suffix(".yaml")?;
        std::fs::write(&file, text)?;
        validate(file.path())?;
    }
    // The schema of the values refuses a value that is misspelt.
    ensure!(render(&["--set", "replica=3"]).is_err());
    Ok(())
}
