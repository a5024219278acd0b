//! `stream-replicator config edit`: the editor is a shell script.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::harness::{Cli, Site};

/// A site with one replication that has a password.
async fn site() -> Result<Site> {
    let site = Site::small().await?;
    let target = site.target.url_as("copy:hunter2");
    site.add("ORDERS", json!({"target_url": target, "max_age": "1h"})).await?;
    Ok(site)
}

/// Commands whose editor runs this with the file as `$1`.
fn with_editor(site: &Site, script: &str) -> Cli {
    site.cli().env("EDITOR", &format!("sh -c '{script}' --"))
}

async fn stored(site: &Site) -> Result<(u64, Value)> {
    let mut body = site.ask("config.get", "ORDERS").await?.body;
    Ok((body["revision"].as_u64().context("a revision")?, body["config"].take()))
}

/// Permissions of the file in which a refused version is said to be kept; removes it.
fn kept(told: &str) -> Result<u32> {
    let path = told.split("kept in `").nth(1).and_then(|rest| rest.split('`').next());
    let path = path.with_context(|| told.to_owned())?;
    let mode = fs::metadata(path)?.permissions().mode() & 0o777;
    fs::remove_file(path)?;
    Ok(mode)
}

#[tokio::test]
async fn what_was_edited_is_stored_and_the_secret_stays() -> Result<()> {
    let site = site().await?;
    let folder = tempfile::tempdir()?;
    let seen = folder.path().join("seen");
    let script = format!("stat -c %a \"$1\" > {0}; cat \"$1\" >> {0}; sed -i s/1h/2h/ \"$1\"", seen.display());
    let edited = with_editor(&site, &script).ok(["config", "edit", "ORDERS"]).await?;
    assert!(edited.starts_with("--- ORDERS (revision 2)\n+++ ORDERS (edited)\n"), "{edited}");
    assert!(edited.contains("\n+  \"max_age\": \"2h\"\n") && edited.ends_with("ORDERS is at revision 3\n"), "{edited}");
    assert!(!edited.contains("hunter2"), "{edited}");
    let seen = fs::read_to_string(seen)?;
    assert!(seen.starts_with("600\n{\n") && seen.contains("copy:***@") && !seen.contains("hunter2"), "{seen}");
    assert_eq!(stored(&site).await?.1["max_age"], "2h");
    let entry = site.bucket("REPLICATOR_CONFIG").await?.get("ORDERS").await?.context("a document")?;
    assert!(String::from_utf8_lossy(&entry).contains("copy:hunter2@"), "{entry:?}");
    Ok(())
}

#[tokio::test]
async fn visual_goes_before_editor() -> Result<()> {
    let site = site().await?;
    let cli = with_editor(&site, "exit 7").env("VISUAL", "sed -i s/1h/3h/");
    cli.ok(["config", "edit", "ORDERS"]).await?;
    assert_eq!(stored(&site).await?.1["max_age"], "3h");
    Ok(())
}

#[tokio::test]
async fn what_was_not_changed_is_not_sent() -> Result<()> {
    let site = site().await?;
    for (script, code, told) in
        [(":", 0, "not changed"), ("exit 7", 1, "ended with exit status: 7: nothing was changed")]
    {
        let ended = with_editor(&site, script).run(["config", "edit", "ORDERS"]).await?;
        assert!(ended.code == Some(code) && ended.stderr.contains(told), "{ended:?}");
    }
    assert_eq!(stored(&site).await?.0, 2);
    Ok(())
}

#[tokio::test]
async fn what_is_refused_is_kept_in_a_file_that_only_we_can_read() -> Result<()> {
    let site = site().await?;
    for (script, told) in [
        ("sed -i s/1h/soon/ \"$1\"", "/max_age: "),
        ("sed -i s/1h// \"$1\"; echo x >> \"$1\"", "not valid JSON"),
        ("printf \"\\351\\n\" > \"$1\"", "not valid JSON"),
        ("sed -i s/ORDERS/OTHER/ \"$1\"", "makes this `OTHER`: only the document of `ORDERS`"),
    ] {
        let ended = with_editor(&site, script).run(["config", "edit", "ORDERS"]).await?;
        assert!(ended.code == Some(1) && ended.stderr.contains(told), "{ended:?}");
        assert_eq!(kept(&ended.stderr)?, 0o600);
    }
    assert_eq!(stored(&site).await?.0, 2);
    Ok(())
}

#[tokio::test]
async fn a_concurrent_change_is_reported_and_not_overwritten() -> Result<()> {
    // The one without the secret makes that `***` stands for nothing any more.
    for secret in [true, false] {
        let site = site().await?;
        let mut other = site.document_with("ORDERS", json!({"description": "from somebody else"}));
        if secret {
            other["target_url"] = site.target.url_as("copy:hunter2").into();
        }
        let folder = tempfile::tempdir()?;
        let file = folder.path().join("other.json");
        fs::write(&file, other.to_string())?;
        // Somebody else is as fast as the editor.
        let binary = crate::harness::service::binary()?;
        let script = format!("sed -i s/1h/2h/ \"$1\"; {} config update {}", binary.display(), file.display());
        let ended = with_editor(&site, &script).run(["config", "edit", "ORDERS"]).await?;
        assert_eq!(ended.code, Some(1), "{ended:?}");
        let told = "`ORDERS` was changed meanwhile: nothing was overwritten";
        assert!(ended.stderr.contains(told), "{ended:?}");
        kept(&ended.stderr)?;
        let (revision, now) = stored(&site).await?;
        assert_eq!((revision, &now["description"], &now["max_age"]), (3, &other["description"], &Value::Null));
    }
    Ok(())
}

#[tokio::test]
async fn on_a_terminal_it_can_be_edited_again() -> Result<()> {
    let site = site().await?;
    let script = "if grep -q 1h \"$1\"; then sed -i s/1h/soon/ \"$1\"; else sed -i s/soon/2d/ \"$1\"; fi";
    let mut running = with_editor(&site, script).on_terminal(["config", "edit", "ORDERS"])?;
    running.shows("/max_age: ").await?;
    running.shows("edit again? [y/N]").await?;
    running.types("y\n")?;
    let ended = running.end().await?;
    assert!(ended.code == Some(0) && ended.stdout.contains("ORDERS is at revision 3"), "{ended:?}");
    assert_eq!(stored(&site).await?.1["max_age"], "2d");

    let mut running = with_editor(&site, "sed -i s/2d/later/ \"$1\"").on_terminal(["config", "edit", "ORDERS"])?;
    running.shows("edit again? [y/N]").await?;
    running.types("n\n")?;
    let ended = running.end().await?;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    kept(&ended.stdout)?;
    assert_eq!(stored(&site).await?.0, 3);
    Ok(())
}
