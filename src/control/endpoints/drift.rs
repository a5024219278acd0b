//! `drift`: how target streams differ from what they would be created with now, and the changes that are safe.

use std::collections::BTreeMap;

use chrono::Utc;
use nats_lane::{
    Dial, Error, Lane,
    jetstream::{Api, StreamInfo},
};
use serde_json::Value;
use tokio::time::{Duration, Instant, timeout_at};
use tracing::info;
use wildmatch::WildMatch;

use super::{
    DEFAULT_LIMIT, RequestContext, check_id, in_time, named, options,
    stream_answers::{PlaceAnswer, ReplyRoom, ReportPlaces, ReportedReplication, replications, short, size},
};
use crate::{
    config::{NativeKind, Replication},
    control::{
        api::{DriftClass, DriftField, DriftReport, DriftRequest, DriftRow, Failure},
        service::Request,
    },
    copy::target::drift::{DriftKind, SettingDrift, StreamPair, without},
    names,
    native::{FeedSubjects, Fit, check_target, target_settings},
    status::{DriftSetting, KnownDrift, State, setting_words},
    supervisor::KnownSides,
};

/// From the request to the answers of all servers; changes are begun until later.
const ANSWER_WITHIN: Duration = Duration::from_millis(1_500);
const FIX_WITHIN: Duration = Duration::from_millis(2_000);
/// Deadline of a change that was begun.
const FIXED_WITHIN: Duration = Duration::from_millis(2_400);

pub(super) async fn drift(context: &RequestContext, request: Request) -> Result<DriftReport, Failure> {
    let begun = Instant::now();
    let asked: DriftRequest = match request.body.trim_ascii() {
        [] | [b'{', ..] => options(&request.body)?,
        _ => named(&request.body, |id| DriftRequest { replication: Some(id), ..DriftRequest::default() })?,
    };
    if asked.fix {
        in_time(&request)?;
        if context.read_only {
            return Err(Failure::new(403, "the service is read-only: it changes no stream"));
        }
    }
    let busy = || Failure::new(503, "too many reports at once: try again");
    let until = begun + ANSWER_WITHIN;
    let _permit = timeout_at(until, context.reports.acquire()).await.map_err(|_| busy())?.map_err(|_| busy())?;
    let all = wanted(context, asked.replication.as_deref()).await?;
    let (total, limit) = (all.len(), asked.limit.unwrap_or(DEFAULT_LIMIT));
    let page: Vec<_> = all.into_iter().skip(asked.offset).take(limit).collect();
    let places = ReportPlaces::of(context, &page);
    let answers = match context.read_only {
        true => places.not_asked("the service is read-only: it connects to no server on request"),
        false => places.ask(context, until).await,
    };
    let mut report =
        DriftReport { site: context.site.clone(), offset: asked.offset, limit, total, replications: Vec::new() };
    let mut fixer = asked.fix.then(|| Fixer { context, lanes: BTreeMap::new(), begun });
    let mut room = ReplyRoom::new(context.room());
    for one in &page {
        let mut row = compared(context, one, &places, &answers);
        if let (Some(fixer), Some(sides)) = (&mut fixer, &one.sides) {
            // What is not shown is not changed either: the next page has it.
            if !room.holds(size(&row) * 2) && !report.replications.is_empty() {
                break;
            }
            fixer.fix(&mut row, sides, &places, &answers).await;
        }
        if !room.takes(size(&row)) && !report.replications.is_empty() {
            break;
        }
        report.replications.push(row);
    }
    Ok(report)
}

/// The replications that a request names, sorted by id.
async fn wanted(context: &RequestContext, name: Option<&str>) -> Result<Vec<ReportedReplication>, Failure> {
    let all = replications(context);
    let Some(name) = name else { return Ok(all) };
    check_id(&name.replace(['*', '?'], "x"))?;
    let known = all.len();
    if name.contains(['*', '?']) {
        let pattern = WildMatch::new(name);
        let found: Vec<_> = all.into_iter().filter(|one| pattern.matches(one.id())).collect();
        let none = || Failure::new(404, format!("none of {known} replications matches `{name}`"));
        return if found.is_empty() { Err(none()) } else { Ok(found) };
    }
    match all.into_iter().find(|one| one.id() == name) {
        Some(one) => Ok(vec![one]),
        None if context.supervisor.row(name).is_some() => {
            Err(Failure::new(409, format!("replication `{name}` finds streams and has none of its own")))
        }
        None => Err(context.not_found(name).await),
    }
}

fn compared(
    context: &RequestContext,
    one: &ReportedReplication,
    places: &ReportPlaces,
    answers: &[PlaceAnswer],
) -> DriftRow {
    let copy = &one.row.copy;
    let mut row = DriftRow {
        replication: one.row.replication.clone(),
        kind: one.sides.as_ref().and_then(|sides| sides.native).into(),
        source_stream: copy.source.stream.clone(),
        target_stream: copy.target.stream.clone(),
        drift: None,
        fields: Vec::new(),
        not_fixed: None,
        error: None,
    };
    let Some(sides) = &one.sides else {
        let error = copy.last_error.as_ref().map(|error| error.message.as_str());
        let none = if one.row.state == State::Invalid { "its document is not valid" } else { "it has no streams" };
        row.error = Some(short(error.unwrap_or(none)));
        return row;
    };
    row.source_stream.clone_from(&sides.source.stream);
    row.target_stream.clone_from(&sides.target.stream);
    row.not_fixed = why_not_fixed(&sides.replication);
    match (places.info(answers, &sides.source), places.info(answers, &sides.target)) {
        (Ok(source), Ok(target)) => {
            let found = differences(&sides.replication, &context.site, source, target);
            row.fields = found.iter().map(|found| field(found, &sides.target.stream)).collect();
            row.drift = Some(found.iter().filter(|found| found.is_drift()).count() as u64);
        }
        (Err(error), _) => row.error = Some(short(&format!("source: {error}"))),
        (_, Err(error)) => row.error = Some(short(&format!("target: {error}"))),
    }
    row
}

/// What is kept of the comparison of these replications, by id.
pub(super) async fn known(
    context: &RequestContext,
    compared_now: &[ReportedReplication],
    until: Instant,
) -> Vec<(String, KnownDrift)> {
    let places = ReportPlaces::of(context, compared_now);
    let answers = places.ask(context, until).await;
    let at = Utc::now();
    let rows = compared_now.iter().map(|one| compared(context, one, &places, &answers));
    rows.map(|row| {
        let known = match &row.error {
            Some(error) => KnownDrift::unknown(at, error),
            None => {
                let drifts = row.fields.iter().filter(|field| field.class != DriftClass::Expected);
                KnownDrift::compared(at, drifts.map(kept).collect(), row.not_fixed)
            }
        };
        (row.replication, known)
    })
    .collect()
}

fn kept(field: &DriftField) -> DriftSetting {
    let DriftField { field: name, setting, class, source, target, wanted, reason, .. } = field;
    let value = |value: &Value| setting_words(name, value);
    DriftSetting {
        field: setting.as_ref().map_or_else(|| name.clone(), |setting| format!("{name} ({setting})")),
        source: value(source),
        target: value(target),
        wanted: value(wanted),
        class: format!("{class:?}").to_lowercase(),
        reason: reason.clone(),
    }
}

/// How many fields of a target differ that are not meant to.
pub(super) fn count(replication: &Replication, site: &str, source: &StreamInfo, target: &StreamInfo) -> u64 {
    differences(replication, site, source, target).iter().filter(|found| found.is_drift()).count() as u64
}

fn differences(replication: &Replication, site: &str, source: &StreamInfo, target: &StreamInfo) -> Vec<SettingDrift> {
    let pair = StreamPair { replication, site, source, target };
    let Some(native) = &replication.native else { return pair.differences(None) };
    let mut found = pair.differences(Some(&target_settings(native.kind, replication, source, site)));
    let reason = match check_target(native.kind, replication, target, &FeedSubjects::of(site, &replication.id)) {
        Ok(Fit::Asks) => return found,
        Ok(Fit::Lacks) => "the target has no source of this replication: the feed adds it where it may".to_owned(),
        Err(error) => error.message,
    };
    let field = if native.kind == NativeKind::Mirror { "mirror" } else { "sources" };
    let value = |stream: &StreamInfo| stream.config.get(field).cloned().unwrap_or_default();
    found.push(SettingDrift {
        field: field.to_owned(),
        kind: DriftKind::Unsafe,
        source: value(source),
        target: value(target),
        wanted: Value::Null,
        reason,
    });
    found
}

fn why_not_fixed(replication: &Replication) -> Option<String> {
    match &replication.native {
        Some(native) if native.kind == NativeKind::Mirror => Some("a mirror that exists is left as it is".to_owned()),
        _ if replication.update_target => None,
        _ => Some("the document does not have `target_update`".to_owned()),
    }
}

fn field(found: &SettingDrift, stream: &str) -> DriftField {
    let SettingDrift { field, kind, source, target, wanted, reason } = found.clone();
    let class = match kind {
        DriftKind::Safe => DriftClass::Safe,
        DriftKind::Unsafe => DriftClass::Unsafe,
        DriftKind::Expected => DriftClass::Expected,
    };
    let setting = setting(stream, &field).map(str::to_owned);
    DriftField { field, setting, class, source, target, wanted, reason, fixed: false, failed: None }
}

/// How a bucket or an object store calls a field of its stream.
fn setting(stream: &str, field: &str) -> Option<&'static str> {
    let is_bucket = stream.starts_with("KV_");
    if !is_bucket && !stream.starts_with("OBJ_") {
        return None;
    }
    match field {
        "max_age" => Some("ttl"),
        "num_replicas" => Some("replicas"),
        "max_msgs_per_subject" if is_bucket => Some("history"),
        "max_msg_size" if is_bucket => Some("max_value_size"),
        "subject_delete_marker_ttl" if is_bucket => Some("limit_marker_ttl"),
        _ => None,
    }
}

/// Makes the safe changes, over one connection to each place.
struct Fixer<'a> {
    context: &'a RequestContext,
    lanes: BTreeMap<usize, Lane>,
    begun: Instant,
}

impl Fixer<'_> {
    async fn fix(&mut self, row: &mut DriftRow, sides: &KnownSides, places: &ReportPlaces, answers: &[PlaceAnswer]) {
        let is_safe = |field: &DriftField| field.class == DriftClass::Safe;
        if row.not_fixed.is_some() || !row.fields.iter().any(is_safe) {
            return;
        }
        let Ok(source) = places.info(answers, &sides.source) else { return };
        let changed = match Instant::now() < self.begun + FIX_WITHIN {
            false => Err("not changed in time: ask again".to_owned()),
            true => {
                let end = self.begun + FIXED_WITHIN;
                timeout_at(end, self.change(sides, source, places))
                    .await
                    .unwrap_or_else(|_| Err("no answer in time".to_owned()))
            }
        };
        let (left, refused) = match changed {
            Ok(changed) => changed,
            Err(error) => {
                row.fields
                    .iter_mut()
                    .filter(|field| is_safe(field))
                    .for_each(|field| field.failed = Some(short(&error)));
                return;
            }
        };
        for field in row.fields.iter_mut().filter(|field| is_safe(field)) {
            field.fixed = left.iter().all(|left| left.field != field.field || !left.is_drift());
            if !field.fixed {
                let why = refused.get(&field.field).map_or("it was changed back by another program", String::as_str);
                field.failed = Some(short(why));
            }
        }
        let fixed: Vec<_> = row.fields.iter().filter(|field| field.fixed).map(|field| field.field.as_str()).collect();
        row.drift = row.drift.map(|drift| drift - fixed.len() as u64);
        info!(replication = row.replication, stream = row.target_stream, ?fixed, "target stream changed by request");
    }

    /// Changes the stream as it is now; returns what differs afterwards, and the fields whose change was refused.
    async fn change(
        &mut self,
        sides: &KnownSides,
        source: &StreamInfo,
        places: &ReportPlaces,
    ) -> Result<(Vec<SettingDrift>, BTreeMap<String, String>), String> {
        let (context, replication) = (self.context, &*sides.replication);
        let place = places.index(&sides.target.place).unwrap_or_default();
        let mut lane = match self.lanes.remove(&place) {
            Some(lane) => lane,
            None => context.rules.dial(&sides.target.place, names::PROGRAM).await.map_err(|error| error.message)?,
        };
        let mut refused = BTreeMap::new();
        let target = current(&mut lane, context, &sides.target.stream).await?;
        let found = differences(replication, &context.site, source, &target);
        let safe: Vec<_> = found.iter().filter(|found| found.kind == DriftKind::Safe).collect();
        if !safe.is_empty() {
            let all = without(&target.config, safe.iter().copied());
            match Api::new(&mut lane).update_stream(&sides.target.stream, &all).await {
                Ok(_) => {}
                // One of several that the server refuses does not keep the others from being made.
                Err(error) if error.api.is_some() => {
                    for one in safe {
                        if let Err(error) = self::one(&mut lane, context, sides, one).await {
                            refused.insert(one.field.clone(), error);
                        }
                    }
                }
                Err(error) => return Err(error.message),
            }
        }
        let target = current(&mut lane, context, &sides.target.stream).await?;
        self.lanes.insert(place, lane);
        Ok((differences(replication, &context.site, source, &target), refused))
    }
}

async fn one(
    lane: &mut Lane,
    context: &RequestContext,
    sides: &KnownSides,
    difference: &SettingDrift,
) -> Result<(), String> {
    let stream = &sides.target.stream;
    let target = current(lane, context, stream).await?;
    let config = without(&target.config, [difference]);
    Api::new(lane).update_stream(stream, &config).await.map(drop).map_err(|error| error.message)
}

/// The target as it is now, if it is none of the service's own.
async fn current(lane: &mut Lane, context: &RequestContext, stream: &str) -> Result<StreamInfo, String> {
    let missing = || Error::hold(format!("stream `{stream}` does not exist"));
    let info = Api::new(lane).stream_info(stream).await.and_then(|info| info.ok_or_else(missing));
    let info = info.map_err(|error| error.message)?;
    match context.own_streams.refuse(stream, &info.created) {
        Some(why) => Err(why),
        None => Ok(info),
    }
}
