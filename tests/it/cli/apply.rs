//! `stream-replicator config apply`: what is stored becomes what files say.

use std::fs;
use std::path::Path;

use anyhow::Result;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::harness::cli::Ended;
use crate::harness::{Cli, Site};

const SECRET: &str = "hunter2-s3cret";

/// Files to apply.
struct AppliedFiles(TempDir);

impl AppliedFiles {
    fn new() -> Result<Self> {
        Ok(Self(tempfile::tempdir()?))
    }

    fn write(&self, name: &str, text: impl AsRef<str>) -> Result<()> {
        Ok(fs::write(self.path().join(name), text.as_ref())?)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    /// `config apply <this folder>` with more arguments.
    async fn apply(&self, cli: &Cli, more: &[&str]) -> Result<Ended> {
        let arguments = ["config".as_ref(), "apply".as_ref(), self.path().as_os_str()];
        let ended = cli.run(arguments.into_iter().chain(more.iter().map(AsRef::as_ref))).await?;
        assert!(!ended.stdout.contains(SECRET) && !ended.stderr.contains(SECRET), "{ended:?}");
        Ok(ended)
    }
}

/// Id and revision of all that is stored.
async fn revisions(site: &Site) -> Result<Vec<(String, u64)>> {
    let list = site.ask("config.list", "").await?.body;
    let rows = list["replications"].as_array().cloned().unwrap_or_default();
    let row = |row: Value| {
        (row["replication"].as_str().unwrap_or_default().to_owned(), row["revision"].as_u64().unwrap_or(0))
    };
    Ok(rows.into_iter().map(row).collect())
}

fn at(rows: &[(&str, u64)]) -> Vec<(String, u64)> {
    rows.iter().map(|(id, revision)| ((*id).to_owned(), *revision)).collect()
}

#[track_caller]
fn ended(ended: &Ended, code: i32, summary: &str) {
    assert_eq!((ended.code, ended.stdout.lines().last()), (Some(code), Some(summary)), "{ended:?}");
}

#[tokio::test]
async fn what_differs_is_added_and_updated_and_the_rest_is_left_alone() -> Result<()> {
    let site = Site::small().await?;
    let (cli, files) = (site.cli(), AppliedFiles::new()?);
    // One document, several one after another, an array; and what is none of ours.
    files.write("a.json", site.document("A").to_string())?;
    files.write("b.json", format!("{}\n{}", site.document("B1"), site.document("B2")))?;
    files.write("c.json", json!([site.document("C1"), site.document_with("C2", json!({"name": "x"}))]).to_string())?;
    files.write("notes.txt", "no JSON")?;
    let first = files.apply(&cli, &[]).await?;
    ended(&first, 0, "5 added, 0 updated, 0 unchanged, 0 removed");
    assert!(first.stderr.contains("/notes.txt`: its name does not end with .json, .yaml or .yml"), "{first:?}");
    let all = at(&[("A", 2), ("B1", 3), ("B2", 4), ("C1", 5), ("C2.x", 6)]);
    assert_eq!(revisions(&site).await?, all);

    ended(&files.apply(&cli, &[]).await?, 0, "0 added, 0 updated, 5 unchanged, 0 removed");
    assert_eq!(revisions(&site).await?, all);

    // Another order of fields is no difference.
    files.write("a.json", format!("{:#}", site.document_with("A", json!({"max_age": "1d"}))))?;
    files.write("b.json", format!("{:#}\n\n{:#}", site.document("B2"), site.document("B1")))?;
    let changed = files.apply(&cli, &[]).await?;
    ended(&changed, 0, "0 added, 1 updated, 4 unchanged, 0 removed");
    let place = files.path().join("a.json");
    let diff = format!("--- A (revision 2)\n+++ A ({})\n@@ ", place.display());
    assert!(changed.stdout.starts_with(&diff), "{diff}\n{}", changed.stdout);
    assert!(changed.stdout.contains("\n+  \"max_age\": \"1d\""), "{}", changed.stdout);
    assert!(changed.stdout.contains("\nA: updated, revision 7\nB2: unchanged, revision 4\n"), "{}", changed.stdout);
    assert_eq!(revisions(&site).await?, at(&[("A", 7), ("B1", 3), ("B2", 4), ("C1", 5), ("C2.x", 6)]));
    Ok(())
}

#[tokio::test]
async fn a_dry_run_shows_the_same_and_changes_nothing() -> Result<()> {
    let site = Site::small().await?;
    let (cli, files) = (site.cli(), AppliedFiles::new()?);
    for stream in ["OLD", "SAME", "OTHER"] {
        site.add(stream, json!({})).await?;
    }
    files.write(
        "all.json",
        json!([site.document("NEW"), site.document("SAME"), site.document_with("OLD", json!({"max_age": "1d"}))])
            .to_string(),
    )?;
    let before = revisions(&site).await?;
    let dry = files.apply(&cli, &["--prune", "--dry-run"]).await?;
    ended(&dry, 0, "dry run, nothing was changed: 1 added, 1 updated, 1 unchanged, 1 removed");
    for line in [
        "--- /dev/null",
        "NEW: added (dry run)",
        "OLD: updated (dry run)",
        "in none of the files: OTHER",
        "OTHER: removed (dry run)",
    ] {
        assert!(dry.stdout.lines().any(|found| found == line), "`{line}` is not in {}", dry.stdout);
    }
    assert_eq!(revisions(&site).await?, before);
    let wet = files.apply(&cli, &["--prune", "--force"]).await?;
    ended(&wet, 0, "1 added, 1 updated, 1 unchanged, 1 removed");
    assert_eq!(revisions(&site).await?, at(&[("NEW", 5), ("OLD", 6), ("SAME", 3)]));
    Ok(())
}

#[tokio::test]
async fn a_changed_secret_is_applied_an_equal_one_is_not() -> Result<()> {
    let site = Site::small().await?;
    let (cli, files) = (site.cli(), AppliedFiles::new()?);
    let document = |secret: &str| {
        let url = site.target.url_as(&format!("copy:{secret}"));
        site.document_with("ORDERS", json!({"target_url": url})).to_string()
    };
    let stored = async || {
        let entry = site.bucket("REPLICATOR_CONFIG").await?.get("ORDERS").await?;
        anyhow::Ok(String::from_utf8_lossy(&entry.unwrap_or_default()).into_owned())
    };
    files.write("orders.json", document(&format!("{SECRET}-1")))?;
    let first = files.apply(&cli, &[]).await?;
    assert!(first.stdout.contains("copy:***@"), "{first:?}");
    ended(&first, 0, "1 added, 0 updated, 0 unchanged, 0 removed");
    ended(&files.apply(&cli, &[]).await?, 0, "0 added, 0 updated, 1 unchanged, 0 removed");

    files.write("orders.json", document(&format!("{SECRET}-2")))?;
    let dry = files.apply(&cli, &["--dry-run"]).await?;
    assert!(dry.stdout.starts_with("ORDERS: looks equal; only the service can compare its secrets"), "{dry:?}");
    ended(&dry, 0, "dry run, nothing was changed: 0 added, 0 updated, 0 unchanged, 0 removed, 1 unknown");
    assert!(stored().await?.contains(&format!("{SECRET}-1")));

    let second = files.apply(&cli, &[]).await?;
    assert_eq!(second.stdout.lines().next(), Some("ORDERS: updated: a secret differs, revision 3"));
    ended(&second, 0, "0 added, 1 updated, 0 unchanged, 0 removed");
    assert!(stored().await?.contains(&format!("{SECRET}-2")));

    // What comes back as it was shown keeps it.
    files.write("orders.json", document("***"))?;
    ended(
        &files.apply(&cli, &["--dry-run"]).await?,
        0,
        "dry run, nothing was changed: 0 added, 0 updated, 1 unchanged, 0 removed",
    );
    files.write("orders.json", document("***").replace('}', ",\"max_age\":\"1d\"}"))?;
    ended(&files.apply(&cli, &[]).await?, 0, "0 added, 1 updated, 0 unchanged, 0 removed");
    let kept = stored().await?;
    assert!(kept.contains(&format!("{SECRET}-2")) && kept.contains("max_age"), "{kept}");
    Ok(())
}

#[tokio::test]
async fn nothing_is_changed_when_one_document_is_wrong() -> Result<()> {
    let site = Site::small().await?;
    let cli = site.cli();
    site.add("KEPT", json!({})).await?;
    let check = async |files: &[(&str, String)], expect: &[&str]| {
        let folder = AppliedFiles::new()?;
        folder.write("good.json", site.document("GOOD").to_string())?;
        for (name, text) in files {
            folder.write(name, text)?;
        }
        let refused = folder.apply(&cli, &["--prune", "--force"]).await?;
        assert_eq!((refused.code, refused.stdout.as_str()), (Some(1), ""), "{refused:?}");
        for text in expect.iter().chain(&["error: the files cannot be applied, nothing was changed"]) {
            assert!(refused.stderr.contains(text), "`{text}` is not in {refused:?}");
        }
        assert_eq!(revisions(&site).await?, at(&[("KEPT", 2)]));
        anyhow::Ok(())
    };
    let secret = format!("http://u:{SECRET}@h");
    let bad =
        json!([site.document("A"), {"stream": "B", "source_url": secret, "target_url": "nats://t", "max_age": "x"}]);
    check(
        &[("bad.json", bad.to_string())],
        &["bad.json, document 2: /source_url: ", "bad.json, document 2: /max_age: "],
    )
    .await?;
    check(
        &[("bad.json", "{\"a\": ".to_owned()), ("worse.json", "x".to_owned())],
        &["bad.json` is not valid JSON", "worse.json` is not valid JSON"],
    )
    .await?;
    check(
        &[("twice.json", format!("[{{}}, {}]", r#"{"stream": "A", "limits": {"a": 1, "a": 2}}"#))],
        &["twice.json`: /1/limits/a: `a` occurs more than once"],
    )
    .await?;
    check(
        &[("again.json", site.document("GOOD").to_string())],
        &["`GOOD` is there more than once: ", "again.json; ", "good.json"],
    )
    .await?;
    let masked = site.document_with("NEW", json!({"source_url": "nats://u:***@h"}));
    check(&[("masked.json", masked.to_string())], &["masked.json: /source_url: ", "`***` stands for a secret"]).await?;
    let masked = site.document_with("KEPT", json!({"source_url": "nats://u:***@h"}));
    check(&[("masked.json", masked.to_string())], &["masked.json: /source_url: "]).await?;
    check(
        &[("list.json", "[5, \"x\"]".to_owned())],
        &["list.json, document 1: document: ", "list.json, document 2: document: "],
    )
    .await?;

    let empty = AppliedFiles::new()?;
    for more in [&["--prune", "--force"][..], &[]] {
        let refused = empty.apply(&cli, more).await?;
        assert!(refused.code == Some(1) && refused.stderr.contains("the files hold no document"), "{refused:?}");
    }
    empty.write("nothing.json", "[]")?;
    let refused = empty.apply(&cli, &["--prune", "--force"]).await?;
    assert!(refused.code == Some(1) && refused.stderr.contains("nothing.json` is empty"), "{refused:?}");
    assert_eq!(revisions(&site).await?, at(&[("KEPT", 2)]));
    let missing = cli.run(["config", "apply", "/no/such/folder"]).await?;
    assert!(missing.code == Some(1) && missing.stderr.contains("cannot read `/no/such/folder`"), "{missing:?}");
    Ok(())
}

#[tokio::test]
async fn a_program_gets_one_report() -> Result<()> {
    let site = Site::small().await?;
    let cli = site.cli();
    site.add("SAME", json!({})).await?;
    site.add("OTHER", json!({})).await?;
    let documents = json!([site.document("SAME"), site.document("NEW")]).to_string();
    let run = cli.run_with(["config", "apply", "-", "--prune", "--force", "--json"], &documents).await?;
    let report: Value = serde_json::from_str(&run.stdout)?;
    let results = report["results"].as_array().cloned().unwrap_or_default();
    assert_eq!((run.code, &report["dry_run"], results.len()), (Some(0), &json!(false), 3), "{report}");
    assert_eq!(results[0], json!({"replication": "SAME", "action": "unchanged", "revision": 2}));
    assert_eq!(
        (&results[1]["replication"], &results[1]["action"], &results[1]["revision"]),
        (&json!("NEW"), &json!("added"), &json!(4))
    );
    assert!(results[1]["diff"].as_str().is_some_and(|diff| diff.contains("+++ NEW (stdin, document 2)")), "{report}");
    assert_eq!((&results[2]["replication"], &results[2]["action"]), (&json!("OTHER"), &json!("removed")));
    Ok(())
}

#[tokio::test]
async fn what_the_service_refuses_is_told_and_the_rest_goes_on() -> Result<()> {
    let site = Site::small().await?;
    let cli = site.cli();
    site.add("OTHER", json!({})).await?;
    // Larger than somebody wants documents to be in the bucket.
    let jetstream = async_nats::jetstream::new(site.client.clone());
    let mut config = jetstream.get_stream("KV_REPLICATOR_CONFIG").await?.cached_info().config.clone();
    config.max_message_size = 1000;
    jetstream.update_stream(config).await?;
    let large = site.document_with("LARGE", json!({"description": "x".repeat(2000)}));
    let documents = json!([large, site.document("NEW")]).to_string();
    let run = cli.run_with(["config", "apply", "-", "--prune", "--force"], &documents).await?;
    assert!(run.stderr.contains("LARGE:\nerror: ") && run.stderr.contains("nothing is removed"), "{run:?}");
    ended(&run, 1, "1 added, 0 updated, 0 unchanged, 0 removed, 1 failed");
    let ids: Vec<_> = revisions(&site).await?.into_iter().map(|(id, _)| id).collect();
    assert_eq!(ids, ["NEW", "OTHER"]);
    Ok(())
}

#[tokio::test]
async fn a_removal_by_apply_asks_and_needs_force() -> Result<()> {
    let site = Site::small().await?;
    let (cli, files) = (site.cli(), AppliedFiles::new()?);
    site.add("KEPT", json!({})).await?;
    site.add("OTHER", json!({})).await?;
    files.write("kept.json", site.document("KEPT").to_string())?;
    let refused = files.apply(&cli, &["--prune"]).await?;
    assert!(refused.code == Some(2) && refused.stderr.contains("`--prune --force`"), "{refused:?}");
    assert_eq!(files.apply(&cli, &["--force"]).await?.code, Some(2));
    for (answer, code, left) in [("n\n", 1, at(&[("KEPT", 2), ("OTHER", 3)])), ("y\n", 0, at(&[("KEPT", 2)]))] {
        let arguments = ["config".as_ref(), "apply".as_ref(), files.path().as_os_str(), "--prune".as_ref()];
        let mut running = cli.on_terminal(arguments)?;
        running.shows("remove 1 of them with position and state: OTHER? [y/N]").await?;
        running.types(answer)?;
        let ended = running.end().await?;
        assert_eq!(ended.code, Some(code), "{ended:?}");
        assert_eq!(revisions(&site).await?, left);
    }
    Ok(())
}

#[tokio::test]
async fn yaml_and_what_get_and_export_write_is_applied() -> Result<()> {
    let site = Site::small().await?;
    let (cli, files) = (site.cli(), AppliedFiles::new()?);
    let (source, target) = (site.document("Y")["source_url"].clone(), site.target.url_as(&format!("copy:{SECRET}")));
    let yaml = |stream: &str| format!("stream: {stream}\nsource_url: {source}\ntarget_url: {target}\nmax_age: 1d\n");
    files.write("both.yaml", format!("---\n$schema: urn:x\n{}---\n{}", yaml("Y1"), yaml("Y2")))?;
    ended(&files.apply(&cli, &[]).await?, 0, "2 added, 0 updated, 0 unchanged, 0 removed");

    // In one line, in the order of the schema, so that `nats kv get` and `history` show it well.
    let entry = site.bucket("REPLICATOR_CONFIG").await?.get("Y1").await?.unwrap_or_default();
    let text = String::from_utf8_lossy(&entry).into_owned();
    assert!(text.starts_with("{\"stream\":\"Y1\",\"source_url\":") && !text.contains('\n'), "{text}");
    assert!(text.ends_with(",\"max_age\":\"1d\"}"), "{text}");

    let shown = cli.ok(["config", "get", "Y*"]).await?;
    assert!(shown.starts_with("{\n  \"stream\": \"Y1\",\n  \"source_url\": "), "{shown}");
    let again = cli.run_with(["config", "apply", "-"], &shown).await?;
    ended(&again, 0, "0 added, 0 updated, 2 unchanged, 0 removed");
    let one = cli.ok(["config", "get", "Y1"]).await?;
    let checked = cli.run_with(["config", "validate", "-"], &one).await?;
    assert!(!checked.stdout.contains("problem: /target_url: `***`"), "{checked:?}");

    let folder = files.path().join("out");
    let folder = folder.to_str().expect("a path");
    let written = cli.ok(["config", "export", "--dir", folder]).await?;
    assert_eq!(written, format!("{folder}/Y1.json\n{folder}/Y2.json\n"));
    assert_eq!(fs::read_to_string(format!("{folder}/Y1.json"))?, one);
    let again = cli.run(["config", "apply", folder]).await?;
    ended(&again, 0, "0 added, 0 updated, 2 unchanged, 0 removed");
    Ok(())
}
