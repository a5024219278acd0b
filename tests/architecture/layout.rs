//! The lists that the rules apply to. If you move a file, adapt them here, and the map in ARCHITECTURE.md.

/// A finding that is accepted today, and its measure: a number of places, or of lines. It may only shrink.
pub type Exception = (&'static str, usize);

/// Everything the rules need to know of a project.
pub struct Layout {
    /// Modules of the crate root and crates of the workspace, top row first. A module imports only from rows below its own.
    pub rows: &'static [&'static [&'static str]],
    /// Modules that decide: what they need is passed in, what they decide is returned.
    pub pure: &'static [&'static str],
    /// Parts of a path that a pure module does not use: they read a clock, wait, draw random numbers or reach the world.
    pub impure_paths: &'static [&'static str],
    /// Methods that a pure module does not call.
    pub impure_methods: &'static [&'static str],
    /// Modules and crates that open sockets.
    pub opens_sockets: &'static [&'static str],
    /// Parts of a path that open a socket.
    pub socket_paths: &'static [&'static str],
    /// A module, a word that its code does not name, and what to do.
    pub never_names: &'static [(&'static str, &'static str, &'static str)],
    /// Texts in which such a word is part of the wire format.
    pub wire_names: &'static [&'static str],
    /// Lines of a file without its tests.
    pub file_lines: usize,
    /// Modules whose functions are measured.
    pub short_functions: &'static [&'static str],
    pub function_lines: usize,
    /// Blocks within each other.
    pub nesting: usize,
    /// Type names that each module may have for itself.
    pub own_names: &'static [&'static str],
    pub exceptions: Exceptions,
}

/// What does not hold yet, for each rule. A test fails for an exception that is no longer needed, too.
#[derive(Default)]
pub struct Exceptions {
    /// `file -> module`.
    pub imports: &'static [Exception],
    /// `module uses path`, as it is written in the failure.
    pub purity: &'static [Exception],
    /// Files.
    pub sockets: &'static [Exception],
    pub never_names: &'static [Exception],
    pub file_lines: &'static [Exception],
    /// `file function`.
    pub function_lines: &'static [Exception],
    pub nesting: &'static [Exception],
    /// Type names, and how many types have each.
    pub type_names: &'static [Exception],
}

/// This project.
pub const LAYOUT: Layout = Layout {
    rows: &[
        &["main"],
        &["cli"],
        &["app", "telemetry"],
        &["control", "http"],
        &["preflight", "supervisor"],
        &["adapter", "native", "verify"],
        &["copy"],
        &["heartbeat", "lease", "sampling"],
        &["election", "events", "store", "traces"],
        &["allow", "nats"],
        &["config", "metrics"],
        &["choria", "status"],
        &["boottime", "names"],
        &["nats-lane"],
    ],
    pure: &[
        "adapter::drops",
        "adapter::queue",
        "choria::adapter",
        "choria::adapter::decode",
        "choria::adapter::output",
        "config::feed_subjects",
        "config::links",
        "config::stream_patterns",
        "copy::source::request_limit",
        "copy::source::clock",
        "copy::decide",
        "copy::target::drift",
        "copy::target::drops",
        "copy::source::gap",
        "copy::source::retention",
        "copy::target::join",
        "copy::target::mark",
        "copy::target::liveness",
        "copy::source::source_end",
        "copy::target::subjects",
        "copy::target::target_limits",
        "copy::moved_consumers::plan",
        "copy::flow::throttle",
        "copy::target::headers",
        "copy::flow::unsaved",
        "copy::flow::watchdog",
        "copy::flow::window",
        "election::machine",
        "lease::machine",
        "lease::placement",
        "native::feed::message",
        "native::headers",
        "native::request",
        "native::session",
        "native::target::mirror",
        "native::witness",
        "parser",
        "refusal",
        "preflight::judge",
        "preflight::limits",
        "sampling",
        "sampling::advisory",
        "sampling::inspect",
        "sampling::outbox",
        "sampling::path",
        "sampling::senders",
        "supervisor::outage",
        "verify::fingerprint",
        "verify::merge",
        "verify::ranges",
    ],
    impure_paths: &[
        "Instant::now",
        "SystemTime::now",
        "Utc::now",
        "Local::now",
        "async_nats",
        "boottime",
        "chance",
        "entropy",
        "rand",
        "std::env",
        "std::fs",
        "std::io::stderr",
        "std::io::stdin",
        "std::io::stdout",
        "std::net",
        "std::process",
        "std::thread",
        "tokio::fs",
        "tokio::io",
        "tokio::net",
        "tokio::runtime",
        "tokio::select",
        "tokio::spawn",
        "tokio::sync",
        "tokio::task",
        "tokio::time::interval",
        "tokio::time::sleep",
        "tokio::time::sleep_until",
        "tokio::time::timeout",
        "tokio::time::timeout_at",
    ],
    impure_methods: &["elapsed"],
    opens_sockets: &["nats", "nats-lane", "http"],
    socket_paths: &[
        "TcpStream",
        "TcpListener",
        "TcpSocket",
        "UdpSocket",
        "UnixStream",
        "UnixListener",
        "UnixDatagram",
        "ConnectOptions",
        "async_nats::connect",
        "async_nats::connect_with_options",
    ],
    never_names: &[(
        "copy",
        "choria",
        "the copy gets what it needs from its document: rules of Choria belong in the module that has all of them",
    )],
    // The headers of a copy.
    wire_names: &["choria-sr-"],
    file_lines: 900,
    short_functions: &["copy", "native"],
    function_lines: 60,
    nesting: 4,
    own_names: &["Args", "Config", "Error"],
    exceptions: Exceptions {
        imports: &[],
        purity: &[("lease::machine uses entropy", 1), ("sampling::senders uses entropy", 2)],
        sockets: &[],
        never_names: &[("src/copy/source/durable.rs", 2)],
        file_lines: &[],
        function_lines: &[],
        nesting: &[],
        type_names: &[("ErrorKind", 2)],
    },
};
