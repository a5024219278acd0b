//! `stream-replicator top`: the replications on a terminal, live, with keys that steer them. The state is in `state.rs`, the picture in
//! `draw.rs`, both without a terminal; here is the loop between keys, answers and the terminal.

mod draw;
mod state;

use std::{env, io::IsTerminal, sync::Arc, thread, time::Duration};

use ratatui::{
    DefaultTerminal,
    crossterm::event::{self, Event, KeyEvent},
};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
    time::{Instant, interval},
};

use self::state::{Action, TopSort, TopState};
use super::{
    client::Client,
    error::{CommandVerdict, Error},
    global::Global,
    output::{Output, clean},
    status_filter::StatusFilter,
    status_view::StatusView,
};
use crate::{
    control::api::{Changed, NamedRequest},
    status::Row,
};

/// How often the status is asked for.
const EVERY: Duration = Duration::from_secs(1);
/// How long the thread that reads keys waits before it checks whether it should end.
const KEY_WAIT: Duration = Duration::from_millis(200);
/// Keys and answers that wait to be shown.
const QUEUE: usize = 64;

/// Watch replications on a terminal, the worst first, and steer them
///
/// Shows rate and lag as lines, state and leader. Keys filter, sort, open one, pause, resume and retry; `?` lists them.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Replications, or patterns of their ids such as `'S0*'` [default: all]
    #[arg(value_name = "ID")]
    ids: Vec<String>,

    /// Order of the rows at the start
    #[arg(long, value_name = "ORDER", value_enum, default_value = "worst")]
    sort: TopSort,

    #[command(flatten)]
    pub(super) global: Global,
}

/// What the loop waits for.
enum Arrival {
    Key(KeyEvent),
    /// The terminal has another size.
    Resized,
    /// Keys cannot be read any more.
    KeysEnded(String),
    Rows(Result<Vec<Row>, String>),
    /// The answer to a change, in words.
    Changed(Result<String, String>),
}

pub(super) async fn run(args: &Args, out: &Output) -> Result<CommandVerdict, Error> {
    if out.json() {
        return Err(Error::Usage("`top` draws on a terminal: use `status --json` for programs".to_owned()));
    }
    let dumb = env::var_os("TERM").is_none_or(|term| term.is_empty() || term == "dumb");
    if !out.terminal() || !std::io::stdin().is_terminal() || dumb {
        return Err(Error::Usage(
            "`top` needs a terminal for keys and picture: use `status --watch` where there is none".to_owned(),
        ));
    }
    let client = Arc::new(Client::connect(&args.global).await?);
    let filter = StatusFilter { ids: args.ids.clone(), ..StatusFilter::default() };
    // What is wrong with the request is printed before the screen is taken.
    let first = StatusView::request(&client, &filter).await?;
    let mut state = TopState::new(clean(&first.reply.value.site), client.server().to_owned(), args.sort);
    state.update(Ok(first.reply.value.replications), std::time::Instant::now());
    let mut signals = EndSignals::new().map_err(|error| Error::Failed(format!("cannot handle signals: {error}")))?;
    // It sets a hook that restores the terminal after a panic, too.
    let terminal = ratatui::try_init().map_err(|error| Error::Failed(format!("cannot use the terminal: {error}")))?;
    let screen = Screen(terminal);
    show(screen, state, &client, &filter, &mut signals).await
}

/// The terminal, which is as before when this is dropped.
struct Screen(DefaultTerminal);

impl Drop for Screen {
    fn drop(&mut self) {
        ratatui::restore();
    }
}

/// EndSignals that end the program.
struct EndSignals([(Signal, u8); 3]);

impl EndSignals {
    fn new() -> std::io::Result<Self> {
        let listen = |kind: SignalKind| {
            let code = 128 + u8::try_from(kind.as_raw_value()).unwrap_or_default();
            Ok::<_, std::io::Error>((signal(kind)?, code))
        };
        Ok(Self([listen(SignalKind::terminate())?, listen(SignalKind::interrupt())?, listen(SignalKind::hangup())?]))
    }

    /// Waits for one; the exit code that shells give it.
    async fn next(&mut self) -> u8 {
        let [(terminate, first), (interrupt, second), (hangup, third)] = &mut self.0;
        tokio::select! {
            _ = terminate.recv() => *first,
            _ = interrupt.recv() => *second,
            _ = hangup.recv() => *third,
        }
    }
}

async fn show(
    mut screen: Screen,
    mut state: TopState,
    client: &Arc<Client>,
    filter: &StatusFilter,
    signals: &mut EndSignals,
) -> Result<CommandVerdict, Error> {
    let (arrive, mut arrivals) = mpsc::channel(QUEUE);
    read_keys(arrive.clone());
    let mut ticks = interval(EVERY);
    let mut asked = None;
    loop {
        let drawn = screen.0.draw(|frame| draw::draw(frame, &mut state));
        drawn.map_err(|error| Error::Failed(format!("the terminal cannot be written to: {error}")))?;
        let arrival = tokio::select! {
            biased;
            code = signals.next() => return Ok(CommandVerdict::Code(code)),
            arrival = arrivals.recv() => arrival,
            now = ticks.tick() => {
                // An answer that is late is waited for, so that requests do not pile up.
                if asked.is_none() {
                    asked = Some(now);
                    ask(client.clone(), filter.clone(), arrive.clone());
                }
                continue;
            }
        };
        match arrival {
            Some(Arrival::Key(key)) => match state.key(key) {
                Action::Nothing => {}
                Action::Quit => return Ok(CommandVerdict::Good),
                Action::Change { endpoint, id } => change(client.clone(), endpoint, id, arrive.clone()),
            },
            Some(Arrival::Resized) => {}
            Some(Arrival::Rows(rows)) => {
                asked = None;
                state.update(rows, Instant::now().into_std());
            }
            Some(Arrival::Changed(answer)) => state.answered(answer),
            Some(Arrival::KeysEnded(why)) => return Err(Error::Failed(format!("keys cannot be read: {why}"))),
            None => return Ok(CommandVerdict::Good),
        }
    }
}

/// Reads keys on a thread of its own, until the loop ends.
fn read_keys(arrive: mpsc::Sender<Arrival>) {
    let next = || -> std::io::Result<Option<Arrival>> {
        if !event::poll(KEY_WAIT)? {
            return Ok(None);
        }
        Ok(match event::read()? {
            Event::Key(key) if key.is_press() => Some(Arrival::Key(key)),
            Event::Resize(..) => Some(Arrival::Resized),
            _ => None,
        })
    };
    thread::spawn(move || {
        while !arrive.is_closed() {
            let arrival = match next() {
                Ok(None) => continue,
                Ok(Some(arrival)) => arrival,
                Err(error) => {
                    let _ = arrive.blocking_send(Arrival::KeysEnded(error.to_string()));
                    return;
                }
            };
            if arrive.blocking_send(arrival).is_err() {
                return;
            }
        }
    });
}

fn ask(client: Arc<Client>, filter: StatusFilter, arrive: mpsc::Sender<Arrival>) {
    tokio::spawn(async move {
        let rows = match StatusView::request(&client, &filter).await {
            Ok(view) => Ok(view.reply.value.replications),
            Err(error) => Err(clean(&error.to_string())),
        };
        // An error means that the loop has ended.
        let _ = arrive.send(Arrival::Rows(rows)).await;
    });
}

fn change(client: Arc<Client>, endpoint: &'static str, id: String, arrive: mpsc::Sender<Arrival>) {
    tokio::spawn(async move {
        let changed = client.change::<Changed>(endpoint, &NamedRequest { replication: id.clone() }).await;
        let done = match endpoint {
            "pause" => "is paused",
            "resume" => "is resumed",
            _ => "is tried again",
        };
        let answer = match changed {
            Ok(_) => Ok(format!("{} {done}", clean(&id))),
            Err(error) => Err(clean(&error.to_string())),
        };
        // An error means that the loop has ended.
        let _ = arrive.send(Arrival::Changed(answer)).await;
    });
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io::Read,
        process::{Command, Stdio},
    };

    use rustix::{pty, termios};

    use super::*;

    /// A part of the test below; without a terminal it fails to take one.
    #[test]
    #[ignore = "another test runs it on a terminal"]
    #[should_panic]
    fn a_panic_on_the_screen() {
        let _screen = Screen(ratatui::try_init().unwrap());
        panic!("as a mistake would");
    }

    #[test]
    fn a_panic_gives_the_terminal_back() {
        let mut master = File::from(pty::openpt(pty::OpenptFlags::RDWR | pty::OpenptFlags::NOCTTY).unwrap());
        pty::grantpt(&master).unwrap();
        pty::unlockpt(&master).unwrap();
        let name = pty::ptsname(&master, Vec::new()).unwrap().into_string().unwrap();
        let device = File::options().read(true).write(true).open(name).unwrap();
        let size = termios::Winsize { ws_col: 80, ws_row: 24, ws_xpixel: 0, ws_ypixel: 0 };
        termios::tcsetwinsize(&device, size).unwrap();
        let before = termios::tcgetattr(&device).unwrap().local_modes;
        let mut child = Command::new(env::current_exe().unwrap())
            .args(["--exact", "cli::top::tests::a_panic_on_the_screen", "--ignored", "--nocapture"])
            .stdin(device.try_clone().unwrap())
            .stdout(device.try_clone().unwrap())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // What it writes fits into the buffer of the terminal.
        child.wait().unwrap();
        assert_eq!(termios::tcgetattr(&device).unwrap().local_modes, before);
        drop(device);
        let mut sent = Vec::new();
        // The end of the other side reads as an error.
        let _ = master.read_to_end(&mut sent);
        let sent = String::from_utf8_lossy(&sent);
        let (taken, back) = (sent.find("\x1b[?1049h"), sent.rfind("\x1b[?1049l"));
        assert!(taken.is_some() && back > taken, "{sent:?}");
    }
}
