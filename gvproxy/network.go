package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/containers/gvisor-tap-vsock/pkg/services/dhcp"
	"github.com/containers/gvisor-tap-vsock/pkg/services/dns"
	"github.com/containers/gvisor-tap-vsock/pkg/services/forwarder"
	"github.com/containers/gvisor-tap-vsock/pkg/tap"
	"github.com/containers/gvisor-tap-vsock/pkg/types"
	"golang.org/x/net/netutil"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/arp"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
)

// Limits for a guest. The guest decides how many connections and flows there are, and each takes memory of this process and a socket of the host:
// without limits 20,000 UDP packets to as many ports take 3 GB. A connection has two buffers, which are smaller when there are many connections.
// A flow ends after 90 s without a packet and has two buffers of 64 KiB. Together that is at most 600 MiB. Buffers of 1 MiB carry 400 MB/s, buffers
// of 256 KiB carry 280 MB/s, larger ones no more (measured).
const (
	maxConnections = 1024
	maxFlows       = 1024
	maxDNSClients  = 64
	bufferSize     = 1 << 20
	// From this number of connections on, new ones have small buffers.
	manyConnections = 128
	smallBufferSize = 96 << 10
	// The wire to the guest loses and repeats nothing, so a connection that both ends have closed need not wait long.
	timeWait = time.Second
	// How long the guest has to close its end of a connection that we have closed, which takes no more data.
	linger = 5 * time.Second
)

var errFull = errors.New("the guest has as many connections as it may")

// network is the guest's network. It is put together from the library's parts here, because the library's own assembly (pkg/virtualnetwork) has no
// place for limits.
type network struct {
	stack *stack.Stack
	card  *tap.Switch
}

func newNetwork(mtu int) (*network, error) {
	link, err := tap.NewLinkEndpoint(false, uint32(mtu), gatewayMAC, gateway, []string{host})
	if err != nil {
		return nil, err
	}
	card := tap.NewSwitch(false)
	link.Connect(card)
	card.Connect(link)
	n := &network{card: card, stack: stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, arp.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4},
	})}
	if err := n.configure(link); err != nil {
		return nil, errors.New(err.String())
	}
	var lock sync.Mutex
	// These handlers get packets that belong to no connection or flow. A packet that is not handled is refused: by a reset, or as port unreachable.
	few, many := dialer(n.stack, bufferSize), dialer(n.stack, smallBufferSize)
	n.stack.SetTransportProtocolHandler(tcp.ProtocolNumber, func(id stack.TransportEndpointID, packet *stack.PacketBuffer) bool {
		switch n.room() {
		case bufferSize:
			return few.HandlePacket(id, packet)
		case smallBufferSize:
			return many.HandlePacket(id, packet)
		}
		return false
	})
	flows := forwarder.UDP(n.stack, translated, &lock, false)
	n.stack.SetTransportProtocolHandler(udp.ProtocolNumber, func(id stack.TransportEndpointID, packet *stack.PacketBuffer) bool {
		_, udp := n.count()
		return udp < maxFlows && flows.HandlePacket(id, packet)
	})
	if err := n.serveNames(); err != nil {
		return nil, err
	}
	return n, n.serveAddresses(mtu)
}

func (n *network) configure(link stack.LinkEndpoint) tcpip.Error {
	if err := n.stack.CreateNIC(1, link); err != nil {
		return err
	}
	ours := tcpip.ProtocolAddress{Protocol: ipv4.ProtocolNumber, AddressWithPrefix: address(gateway).WithPrefix()}
	if err := n.stack.AddProtocolAddress(1, ours, stack.AddressProperties{}); err != nil {
		return err
	}
	n.stack.SetSpoofing(1, true)
	n.stack.SetPromiscuousMode(1, true)
	_, all, _ := net.ParseCIDR(subnet)
	guests, _ := tcpip.NewSubnet(tcpip.AddrFromSlice(all.IP), tcpip.MaskFromBytes(all.Mask))
	n.stack.SetRouteTable([]tcpip.Route{{Destination: guests, NIC: 1}})
	wait, rest := tcpip.TCPTimeWaitTimeoutOption(timeWait), tcpip.TCPLingerTimeoutOption(linger)
	if err := n.set(&wait, &rest); err != nil {
		return err
	}
	return n.setBuffers(smallBufferSize)
}

// setBuffers sets the size of the buffers of new connections, in bytes.
func (n *network) setBuffers(size int) tcpip.Error {
	receive := tcpip.TCPReceiveBufferSizeRangeOption{Min: tcp.MinBufferSize, Default: size, Max: size}
	send := tcpip.TCPSendBufferSizeRangeOption{Min: tcp.MinBufferSize, Default: size, Max: size}
	return n.set(&receive, &send)
}

func (n *network) set(options ...tcpip.SettableTransportProtocolOption) tcpip.Error {
	for _, option := range options {
		if err := n.stack.SetTransportProtocolOption(tcp.ProtocolNumber, option); err != nil {
			return err
		}
	}
	return nil
}

// count returns the numbers of connections and flows, with those that are ending.
func (n *network) count() (connections, flows int) {
	for _, endpoint := range n.stack.RegisteredEndpoints() {
		endpoint, ok := endpoint.(tcpip.Endpoint)
		if !ok {
			continue
		}
		if _, ok := endpoint.Stats().(*tcp.Stats); ok {
			connections++
		} else {
			flows++
		}
	}
	return connections, flows
}

// room sets and returns the size of the buffers of one more connection; 0 when there may not be one more. Connections that are not established do
// not count, so there may be `maxDialing` more than `maxConnections`.
func (n *network) room() int {
	connections, _ := n.count()
	size := bufferSize
	if connections >= manyConnections {
		size = smallBufferSize
	}
	if connections >= maxConnections || n.setBuffers(size) != nil {
		return 0
	}
	return size
}

// dial connects to a port of the guest.
func (n *network) dial(ctx context.Context, port uint16) (net.Conn, error) {
	if n.room() == 0 {
		return nil, errFull
	}
	return gonet.DialContextTCP(ctx, n.stack, tcpip.FullAddress{NIC: 1, Addr: address(guest), Port: port}, ipv4.ProtocolNumber)
}

func (n *network) serveNames() error {
	here := tcpip.FullAddress{NIC: 1, Addr: address(gateway), Port: 53}
	packets, err := gonet.DialUDP(n.stack, &here, nil, ipv4.ProtocolNumber)
	if err != nil {
		return err
	}
	clients, err := gonet.ListenTCP(n.stack, here, ipv4.ProtocolNumber)
	if err != nil {
		return err
	}
	names := []types.Record{{Name: "host", IP: net.ParseIP(host)}, {Name: "gateway", IP: net.ParseIP(gateway)}}
	zones := []types.Zone{{Name: "machinen.internal.", Records: names}, {Name: "docker.internal.", Records: names}}
	server, err := dns.New(packets, netutil.LimitListener(clients, maxDNSClients), zones)
	if err != nil {
		return err
	}
	go func() { _ = server.Serve() }()
	go func() { _ = server.ServeTCP() }()
	return nil
}

func (n *network) serveAddresses(mtu int) error {
	_, all, err := net.ParseCIDR(subnet)
	if err != nil {
		return err
	}
	pool := tap.NewIPPool(all)
	pool.Reserve(net.ParseIP(gateway), gatewayMAC)
	server, err := dhcp.New(&types.Configuration{MTU: mtu, Subnet: subnet, GatewayIP: gateway}, n.stack, pool)
	if err != nil {
		return fmt.Errorf("dhcp: %w", err)
	}
	go func() { _ = server.Serve() }()
	return nil
}

func (n *network) serve(card net.Conn) error {
	return n.card.Accept(context.Background(), card, types.QemuProtocol)
}

func address(text string) tcpip.Address {
	return tcpip.AddrFrom4Slice(net.ParseIP(text).To4())
}
