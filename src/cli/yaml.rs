//! YAML as commands print it.

use serde_json::Value;

/// YAML in which every text is in double quotes, as in JSON: nothing is taken for a boolean or a number.
pub(super) fn write(value: &Value) -> String {
    let mut text = String::new();
    write_yaml(value, 0, &mut text);
    text
}

fn write_yaml(value: &Value, indent: usize, text: &mut String) {
    let margin = " ".repeat(indent);
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            for (field, value) in fields {
                let plain = field.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
                let field = if plain { field.clone() } else { Value::from(field.as_str()).to_string() };
                text.push_str(&format!("{margin}{field}:"));
                write_below(value, indent, text);
            }
        }
        Value::Array(values) if !values.is_empty() => {
            for value in values {
                text.push_str(&margin);
                text.push('-');
                write_entry(value, indent, text);
            }
        }
        other => text.push_str(&format!("{margin}{other}\n")),
    }
}

/// The value of a field, after its colon.
fn write_below(value: &Value, indent: usize, text: &mut String) {
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            text.push('\n');
            write_yaml(value, indent + 2, text);
        }
        Value::Array(values) if !values.is_empty() => {
            text.push('\n');
            write_yaml(value, indent + 2, text);
        }
        other => text.push_str(&format!(" {other}\n")),
    }
}

/// An entry of a list, after its dash.
fn write_entry(value: &Value, indent: usize, text: &mut String) {
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            let mut inner = String::new();
            write_yaml(value, indent + 2, &mut inner);
            text.push(' ');
            text.push_str(inner.trim_start());
        }
        other => text.push_str(&format!(" {other}\n")),
    }
}
